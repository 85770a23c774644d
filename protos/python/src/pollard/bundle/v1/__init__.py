"""Generated code of the contracts in package pollard.bundle.v1."""
