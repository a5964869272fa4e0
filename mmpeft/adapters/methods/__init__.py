"""The methods, one file a family: configs and their maths; see `docs/methods.md` for the list."""
