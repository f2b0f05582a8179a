"""An adapter into another form, a merged model or a LoRA, and the check that the outputs agree."""
