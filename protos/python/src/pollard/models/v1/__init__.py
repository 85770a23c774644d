"""Generated code of the contracts in package pollard.models.v1."""
