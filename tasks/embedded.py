"""The embedded tasks: generated from facts and text of every installation, so that they need no network.

- `embedded_translation`: English to French, from CLDR.
- `embedded_qa`: extractive questions over CLDR facts.
- `embedded_choices`: multiple choice, the held-out questions of `embedded_qa` with four answers each.
- `embedded_code`: functions with hidden tests.
- `embedded_pretraining`: Python's documentation and sources, and lines of the other training splits.

Importing this module registers them; data and vocabulary are generated on first use.
"""

from diffusion_lm.evaluation import metrics
from diffusion_lm_tasks import (
    embedded_choices,
    embedded_code,
    embedded_pretraining,
    embedded_qa,
    embedded_translation,
    preprocessors,
    vocabularies,
)

VOCABULARY = vocabularies.embedded_vocabulary()

preprocessors.add(
    "embedded_translation",
    source=preprocessors.example_source(embedded_translation.examples),
    preprocessors=(),
    features=preprocessors.paired_features(VOCABULARY),
    postprocess_fn=preprocessors.text_reference,
    metric_fns=(metrics.bleu,),
)
preprocessors.add(
    "embedded_qa",
    source=preprocessors.example_source(embedded_qa.examples),
    preprocessors=(),
    features=preprocessors.paired_features(VOCABULARY),
    postprocess_fn=preprocessors.json_reference,
    metric_fns=(metrics.squad,),
)
preprocessors.add(
    "embedded_choices",
    source=preprocessors.example_source(embedded_choices.examples, splits=tuple(embedded_choices.SIZES)),
    preprocessors=(),
    features=preprocessors.paired_features(VOCABULARY),
    postprocess_fn=preprocessors.json_reference,
)
preprocessors.add(
    "embedded_code",
    source=preprocessors.example_source(embedded_code.examples),
    preprocessors=(),
    features=preprocessors.paired_features(VOCABULARY),
    postprocess_fn=preprocessors.json_reference,
    metric_fns=(metrics.pass_at_k,),
)
preprocessors.add(
    "embedded_pretraining",
    source=preprocessors.python_source(
        lambda split: ({"text": text} for text in embedded_pretraining.documents(split)), ("text",)
    ),
    preprocessors=(preprocessors.documents,),
    features=preprocessors.document_features(VOCABULARY),
)
