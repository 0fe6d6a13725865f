"""How integers of KV are laid out as pictures."""
