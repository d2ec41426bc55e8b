"""The scenarios that ship, as TOML."""
