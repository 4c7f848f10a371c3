"""Where runs are done: in processes of this machine, or on a cluster."""
