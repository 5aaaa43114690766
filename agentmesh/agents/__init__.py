"""The agent kinds: what turns an inbox into a message."""
