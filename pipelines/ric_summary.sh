#!/usr/bin/env bash
# Rewards-in-Context (arXiv 2402.10207) on Reddit summaries: three rewards in the prompt, two online rounds, 15 weights.
# usage:    SUMMARIES=FOLDER pipelines/ric_summary.sh [--tiny] [--list] [OUT]        a killed run continues when it is run again
# fetches:  meta-llama/Llama-2-7b-hf (its licence has to be accepted), Tristan's GPT-2 summary reward, CogComp's
#           faithfulness detector, OpenAssistant's DeBERTa reward
# needs:    the comparisons of summarize-from-feedback (MIT) as FOLDER/train.jsonl and FOLDER/valid.jsonl, a GPU of 80 GB; not run here
# expect:   OUT/compare/report.html, as ric_hh.sh; the paper reports no hypervolume
# as there: both summaries of each comparison, the paper's three rewards at once, the one-line template, 48 tokens; all else as in
#           ric_hh.sh
# not as there: as in ric_hh.sh; a grid of 15 weights for the paper's 13; the post keeps its last letters, of which the released code
#           strips those of "### Response:"; two blanks before the numbers
source "$(dirname "$0")/common.sh"
if [ -n "$tiny" ]; then
  run tiny --out "$out/tiny"
  base=$out/tiny/model pairs=hh:$out/tiny/hh.jsonl asked=hh:$out/tiny/hh.jsonl held=hh:$out/tiny/hh.jsonl
  rewards='[summary=long,faithful=readable,deberta=brief]' rounds=(--limit 20) points=(--limit 6 --steps 1 --n_boot 50 --examples 1)
  drawn=(--sampling.max_new_tokens 16)
  offline=(--ric.wording released --sft.format summary --sft.lora.rank 2 --sft.max_length 128 --sft.test_share 0.5
    --sft.fit.batch_size 4 --sft.fit.max_steps 3)
  online=("${offline[@]}" --ric.replay_rows 8)
else
  SUMMARIES=${SUMMARIES:-$here/../../shared/data/summarize_from_feedback}
  base=$out/base pairs=summarize:$SUMMARIES/train.jsonl asked=summarize:$SUMMARIES/train.jsonl held=summarize:$SUMMARIES/valid.jsonl
  fetch "$base" meta-llama/Llama-2-7b-hf summary.jinja
  rewards='[summary=field:summary,faithful=field:faithful,deberta=field:deberta]' rounds=(--limit 20000) points=(--limit 2000 --steps 4)
  drawn=(--sampling.max_new_tokens 48 --sampling.temperature 0.7)
  lora=(--sft.format summary --sft.lora.rank 64 --sft.lora.alpha 128 --sft.lora.dropout 0.05 --sft.lora.targets '[q_proj,v_proj]'
    --sft.max_length 512 --sft.test_share 0.01 --sft.fit.batch_size 8 --sft.fit.warmup 0 --sft.fit.weight_decay 0.01
    --sft.fit.precision bfloat16 --sft.fit.checkpoint_every 500 --sft.licence 'MIT (summarize-from-feedback, OpenAI)')
  offline=("${lora[@]}" --ric.wording released --sft.fit.learning_rate 1.414e-4 --sft.fit.schedule linear --sft.fit.max_steps 20000)
  online=("${lora[@]}" --ric.wording released --sft.fit.learning_rate 1e-5 --sft.fit.schedule constant --sft.fit.max_steps 4000)
fi
source "$here/ric_stages.bash"
