"""Pictures and report.html: values in, pictures out."""
