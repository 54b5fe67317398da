"""Doubtful labels and copies in a set of photos, by embedding: `labels`, `copies`, the `findings`, and their `page`."""
