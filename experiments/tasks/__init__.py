"""The data and the metrics of tasks that encoders are fine-tuned on."""
