"""Urza, the library of stored seeds. Nothing here yet; planned: save a seed that proved itself, germinate it again."""
