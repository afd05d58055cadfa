#!/usr/bin/env bash
# Multi-objective online DPO (MO-ODPO, arXiv 2503.00295) on HH-RLHF's prompts, with the settings of its port in MAVIS (2508.13415): one policy that
# is told its weights in the prompt; and the same trained into adapters that the weights mix.
# usage:    pipelines/online_dpo_hh.sh [--tiny] [--list] [OUT]        a killed run continues when it is run again
# fetches:  meta-llama/Llama-2-7b-hf (its licence has to be accepted), Anthropic/hh-rlhf, two of Ray2333's GPT-2 rewards (about 20 GB)
# needs:    a GPU of 80 GB; not run here. An SFT of one epoch, then two trainings of 16,000 responses of 128 tokens
# expect:   OUT/compare/report.html: six points of each, at weights whose steps of 0.2 are those that it was trained at
# as there: two responses per prompt; weights on a grid of 0.2, all alike; LoRA 64/128; 5e-7; eight batches per step; 128 tokens
# not as there: every prompt has weights of its own, one vector per step and process there; labels are Bradley and Terry's law of the
#           standardised rewards (the better one outright there: --online_dpo.labels hard); drawn from all tokens (top 30 there); beta is 0.1
#           of the rewards' standard deviation (given by hand there); the same words name the objectives in training and in serving
source "$(dirname "$0")/common.sh"
source "$here/hh_sft.bash"
if [ -n "$tiny" ]; then
  points=(--limit 4 --steps 2 --n_boot 50 --examples 1) tokens=8
  loop=(--loop.rounds 2 --loop.prompts 4 --loop.samples 2 --loop.steps 2 --loop.lora.rank 2)
else
  points=(--limit 200 --steps 5) tokens=128
  loop=(--loop.rounds 125 --loop.prompts 64 --loop.samples 2 --loop.steps 8 --loop.grid 5 --loop.lora.rank 64 --loop.lora.alpha 128
    --loop.beta 0.1 --loop.fit.learning_rate 5e-7 --loop.fit.schedule constant --loop.fit.batch_size 1 --loop.fit.accumulate 8
    --loop.fit.precision bfloat16)
fi

own_scale "$tokens"
for reads in prompt parameters; do
  run train online_dpo --out "$out/$reads" --model "$base" --prompts "$out/prompts/prompts.jsonl" --rewards "$rewards" \
    --statistics "$out/statistics.json" --loop.reads "$reads" --loop.sampling.max_new_tokens "$tokens" "${loop[@]}"
done
run compare --out "$out/compare" --model "$base" --prompts "$out/prompts/prompts.jsonl" --split test "${points[@]}" \
  --methods "{prompt: {policy: '$out/prompt/adapter'}, parameters: {policy: '$out/parameters/adapter'}}" --rewards "$rewards" --judges '[]' \
  --samples 1 --reference_samples 2 --best_of '[2]' --sampling.max_new_tokens "$tokens"
