#!/usr/bin/env bash
# Rewards-in-Context (arXiv 2402.10207) on HH-RLHF: harmless and helpful in the prompt, two online rounds, 11 weights.
# usage:    pipelines/ric_hh.sh [--tiny] [--list] [OUT]        a killed run continues when it is run again
# fetches:  meta-llama/Llama-2-7b-hf (its licence has to be accepted), Anthropic/hh-rlhf, two of Ray2333's GPT-2 rewards (about 20 GB)
# needs:    a GPU of 80 GB; not run here. 160,000 + 2 x 32,000 training rows, 2 x 20,000 + 34 x 2,000 samples of 128 tokens, 320,000 scored
# expect:   OUT/compare/report.html: the front with targets that can be reached (RiC) beside that with the released code's, and that of
#           the offline policy; each round's correlation of goals and scores. The paper reports no hypervolume
# as there: chosen and rejected answers, two rewards, <rm1_score> and <rm2_score> at the end of the dialogue, rank 64 on q and v, rate
#           1.414e-4 down a line for 20,000 steps of 8 rows; per round 20,000 samples at temperature 0.7 with all rewards but one at their
#           best, any objective above its 0.7 quantile kept, 10,000 offline rows replayed, 4,000 steps at a constant 1e-5
# not as there: rows in the plain template of turns; a round adds an adapter to the last one's; top 40 tokens in place of
#           90 % of the mass; bfloat16 in place of 8 bits; long rows are cut and not left out; the KL is exact and reported
source "$(dirname "$0")/common.sh"
if [ -n "$tiny" ]; then
  run tiny --out "$out/tiny"
  base=$out/tiny/model pairs=hh:$out/tiny/hh.jsonl asked=hh:$out/tiny/hh.jsonl held=hh:$out/tiny/hh.jsonl
  rewards='[harmless=readable,helpful=long]' rounds=(--limit 20) points=(--limit 6 --steps 2 --n_boot 50 --examples 1) drawn=(--sampling.max_new_tokens 16)
  offline=(--ric.wording released --sft.lora.rank 2 --sft.max_length 128 --sft.test_share 0.5 --sft.fit.batch_size 4 --sft.fit.max_steps 3)
  online=("${offline[@]}" --ric.replay_rows 8)
else
  base=meta-llama/Llama-2-7b-hf pairs=hh:$out/hh/train.jsonl asked=hh:$out/hh/train.jsonl held=hh:$out/hh/test.jsonl
  if [ -z "$list" ] && [ ! -e "$out/hh/test.jsonl" ]; then
    hf download Anthropic/hh-rlhf --repo-type dataset --local-dir "$out/hub"
    mkdir -p "$out/hh"
    for part in train test; do
      gzip -dc "$out"/hub/*/"$part.jsonl.gz" > "$out/hh/part" && mv "$out/hh/part" "$out/hh/$part.jsonl"
    done
  fi
  rewards='[harmless=field:harmless,helpful=field:helpful]' rounds=(--limit 20000) points=(--limit 2000 --steps 10)
  drawn=(--sampling.max_new_tokens 128 --sampling.temperature 0.7)
  lora=(--sft.lora.rank 64 --sft.lora.alpha 128 --sft.lora.dropout 0.05 --sft.lora.targets '[q_proj,v_proj]' --sft.max_length 512
    --sft.test_share 0.01 --sft.fit.batch_size 8 --sft.fit.warmup 0 --sft.fit.weight_decay 0.01 --sft.fit.precision bfloat16
    --sft.fit.checkpoint_every 500 --sft.licence 'MIT (HH-RLHF, Anthropic)')
  offline=("${lora[@]}" --ric.wording released --sft.fit.learning_rate 1.414e-4 --sft.fit.schedule linear --sft.fit.max_steps 20000)
  online=("${lora[@]}" --ric.wording released --sft.fit.learning_rate 1e-5 --sft.fit.schedule constant --sft.fit.max_steps 4000)
fi
source "$here/ric_stages.bash"
