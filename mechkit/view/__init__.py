"""Pictures. A view knows no model: it gets tables and arrays."""
