"""The one way to the machine: a queue in front of the device, one compute thread, and the engines kept in memory."""
