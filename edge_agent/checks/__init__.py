"""What `sketchfleet-agent doctor` looks at: each check finds something and says how to mend it."""
