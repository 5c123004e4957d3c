"""How a model lies on the processes of a job."""
