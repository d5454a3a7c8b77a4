"""What ``kdcli export`` is made of: a package of program code for compressed students, weights' names, model card, check."""
