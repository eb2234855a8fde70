from .configuration_transcoder import TranscoderConfig as TranscoderConfig
from .modeling_transcoder import TranscoderModel as TranscoderModel
from .modeling_transcoder import TranscoderOutput as TranscoderOutput
from .transcoder_set import TranscoderSet as TranscoderSet
from .transcoder_set import TranscoderSetOutput as TranscoderSetOutput
