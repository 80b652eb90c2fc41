"""datatrove's step with the HashEncoder, in a module that other processes import."""

from preparing import use_the_hash_encoder

from lcm_ds.integrations.datatrove import EncodeConcepts


class HashConcepts(EncodeConcepts):
    """A step with the HashEncoder."""

    def work(self, config, rank, world_size):
        use_the_hash_encoder()
        super().work(config, rank, world_size)
