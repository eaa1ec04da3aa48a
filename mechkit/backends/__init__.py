"""Where a model runs. Every backend keeps the contract of ``protocol``."""
