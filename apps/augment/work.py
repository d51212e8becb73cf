"""What python -m apps.augment does with its options, in printed lines."""

from pathlib import Path

from apps.augment.folders import read_data
from apps.augment.network import load_network
from apps.augment.options import Options
from apps.augment.report import write_page
from apps.augment.result import record_of, told
from apps.augment.study import Study
from discriminative.command_line import is_one_of_several
from discriminative.errors import UsageError
from discriminative.hub import quiet_libraries
from discriminative.precision import resolve_device
from discriminative.records.files import write_json
from discriminative.records.locks import alone_in


def work(options: Options) -> int:
    """Do all that the options say; the exit code.

    Raises:
        UsageError, WorkError: in one line what was wrong.
    """
    if is_one_of_several():
        raise UsageError("accelerate launch: several processes were started; allowed is one")
    quiet_libraries()
    device = resolve_device(options.device)
    network = load_network(options)
    data, content = read_data(options)
    sizes = f"{len(data.real)} real pictures, {len(data.generated)} generated, {len(data.test)} of the test"
    print(f"{len(data.classes)} classes; {sizes}, {len(data.val)} to choose the share on")
    for note in data.notes:
        print(f"note: {note}")
    folder = Path(options.output_path)
    with alone_in(folder):
        result = Study(options, data, network, device, content).run()
        record = record_of(result, options, device)
        write_json(folder / "report.json", record)
        page = write_page(folder / "report.html", result, record)
    print("\n".join(told(result, options)))
    print(f"report: {page}")
    return 0
