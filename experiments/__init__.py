"""What clustered attention does to real models and real data, one script a table or figure."""
