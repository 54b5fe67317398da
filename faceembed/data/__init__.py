"""Photographs of people: sources, splits, the P×K plan, decoding, verification lists."""
