"""The paper's three claims, each by one command."""
