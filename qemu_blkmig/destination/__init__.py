"""The receiving side: runs beside the destination's storage, as a child process or over ssh."""
