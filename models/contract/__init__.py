"""What every model is held to when it is wrapped: what it says about itself, and what it does when it is run."""
