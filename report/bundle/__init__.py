"""A report and all behind it as one folder to hand on."""
