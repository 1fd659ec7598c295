"""What any such program needs and no science: command lines, files, downloads, tokenizers, data,
training runs, the terminal, statistics. Nothing here imports the heart or the tasks."""
