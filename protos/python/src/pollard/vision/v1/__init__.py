"""Generated code of the contracts in package pollard.vision.v1."""
