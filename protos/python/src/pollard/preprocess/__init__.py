"""Generated code of the contracts in package pollard.preprocess."""
