"""Typed, validated settings of every stage; one module per stage, `base` for what they share."""
