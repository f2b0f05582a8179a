"""A run becomes something a person looks at."""
