from .answer_metrics import Estimate as Estimate
from .answer_metrics import accuracy as accuracy
from .answer_metrics import bootstrap_interval as bootstrap_interval
from .answer_metrics import estimate as estimate
from .answer_metrics import kl_divergence as kl_divergence
from .answer_metrics import logit_difference as logit_difference
from .answer_metrics import probability_difference as probability_difference
from .answer_metrics import rank as rank
from .answer_metrics import wilson_interval as wilson_interval
from .colored_objects import colored_objects as colored_objects
from .docstring_completion import docstring_completion as docstring_completion
from .gendered_pronoun import gendered_pronoun as gendered_pronoun
from .greater_than import greater_than as greater_than
from .imports import from_auto_circuit_json as from_auto_circuit_json
from .imports import from_eap_csv as from_eap_csv
from .imports import from_mib as from_mib
from .imports import from_pairs_json as from_pairs_json
from .ioi import indirect_object_identification as indirect_object_identification
from .measuring import end_logits as end_logits
from .measuring import measure as measure
from .measuring import row_metrics as row_metrics
from .subject_verb_agreement import subject_verb_agreement as subject_verb_agreement
from .task import AnswerBatch as AnswerBatch
from .task import Task as Task
from .task import TokenBatch as TokenBatch

TASKS: dict[str, str]
