"""What it is about: facts, the statements that train them in one direction, the questions that test both."""
