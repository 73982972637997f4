"""Shared foundations: errors, frozen dataclasses that cross rooms, atomic files."""
