"""Question sets, and the judges that mark their answers."""
