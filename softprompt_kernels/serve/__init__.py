"""An endpoint that speaks OpenAI's protocol: one model, many soft prompts, requests decoded together."""
