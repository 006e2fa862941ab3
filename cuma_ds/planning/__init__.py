"""What a run will need before it is started: memory, bytes on the wire, seconds. No process group, no weights."""
