"""Options of a dataclass with their ranges: each declared once, beside its default, and checked before anything runs."""
