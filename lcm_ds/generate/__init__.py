"""Text generation: prompts to concepts, concepts to concepts, and concepts to sentences."""
