"""The embedded profiles of a run: all ranks share the work, and what a killed start had embedded is kept."""

from __future__ import annotations

from cuma_ds.config import RunConfig
from cuma_ds.data.prepared import PreparedData
from cuma_ds.errors import ModelError
from cuma_ds.files import remove_folder
from cuma_ds.parallel.agreement import agreement, together
from cuma_ds.parallel.topology import Topology
from cuma_ds.profiles import ProfileTable, encoder_of
from cuma_ds.profiles.embedding import EmbeddingStore, embed
from cuma_ds.runs import Run
from cuma_ds.telemetry.progress import bar


def take_known_profiles(config: RunConfig, run: Run, data: PreparedData) -> int:
    """Put what is embedded already into the run folder; the main rank calls it.

    Args:
        config: the recipe.
        run: its folder.
        data: may come with a table of its own.

    Returns:
        Number of profiles that are not embedded yet.

    Raises:
        DataError: as :meth:`PreparedData.stored_table`.
    """
    if run.profiles_file.is_file():
        return 0
    encoder = encoder_of(config.profiles)
    table = data.stored_table(encoder)
    if table is not None:
        table.save(run.profiles_file)
        return 0
    here = EmbeddingStore(run.embedded, encoder.fingerprint)
    known = here.read(data.sentences)
    cached = EmbeddingStore(config.profiles.cache_dir, encoder.fingerprint).read(data.sentences)
    here.add({sentence: vector for sentence, vector in cached.items() if sentence not in known})
    return len(set(data.sentences) - known.keys() - cached.keys())


def embed_profiles(config: RunConfig, run: Run, topology: Topology) -> None:
    """Write the table of embedded profiles, unless the run folder has one; all ranks call it.

    Each rank leaves its share in the run folder. A rank without this encoder is no help: the main rank embeds what is
    missing in the end.

    Raises:
        ModelError: the main rank has no encoder.
    """

    def share() -> None:
        if run.profiles_file.is_file():
            return
        try:
            encoder = encoder_of(config.profiles)
            here, sentences = EmbeddingStore(run.embedded, encoder.fingerprint), run.data().sentences
            with bar("embedding profiles", topology.is_main and config.telemetry.progress) as told:
                embed(sentences, encoder, here, topology.rank, topology.world, told)
        except ModelError:
            if topology.is_main:
                raise

    together(share)
    with agreement():
        if topology.is_main and not run.profiles_file.is_file():
            table = ProfileTable.build(run.data().sentences, encoder_of(config.profiles), run.embedded)
            table.save(run.profiles_file)
            cache = EmbeddingStore(config.profiles.cache_dir, table.fingerprint)
            known, rows = cache.read(table.sentences), zip(table.sentences, table.embeddings, strict=True)
            cache.add({sentence: vector for sentence, vector in rows if sentence not in known})
        if topology.is_main:
            remove_folder(run.embedded)
