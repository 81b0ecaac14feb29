"""Four-bit weights and eight-bit activations: schemes, their arithmetic while training, and packed integers.

`scheme` says what is quantized how; `weight_quantizer` (paper, Eq. 4) and `token_quantizer` (Eq. 3) are the numbers;
`packed_int4` is the storage. What trains is what ships: a fake-quantized weight is scale times the integer that is
stored, to the bit.
"""
