"""What the weights alone say: singular directions of heads, composition between them, token circuits."""
