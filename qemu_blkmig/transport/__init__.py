"""How the agent beside the destination is reached."""
