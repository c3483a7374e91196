"""Build hosts, this machine among them: how commands run there, and how the agent is talked to."""
