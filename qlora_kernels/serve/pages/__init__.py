"""The chat page: plain HTML, CSS and JavaScript, as the server hands them out."""
