"""Evidence for a claim: controls, intervals, prompts it was not found on; differences between groups."""
