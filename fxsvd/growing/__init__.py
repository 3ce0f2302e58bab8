"""How spaces grow without changing what the network computes."""
