"""`softprompt chat`: a conversation with a model behind a prompt, a full text or nothing."""
