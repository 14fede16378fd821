"""The service: who is enrolled, what each device is asked, how updates merge, how fair it is."""
