"""The mixture: router -> dispatcher -> experts -> combine, and the balance of the load."""
