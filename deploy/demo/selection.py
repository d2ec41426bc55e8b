"""Names what the demo corpus takes from the documentation of a stock CPython."""

from __future__ import annotations

BUILTINS = """
abs all any bin callable chr delattr divmod eval exec filter float frozenset getattr globals hasattr hash hex id input
isinstance issubclass iter len list locals map next oct open ord print repr reversed round setattr sorted staticmethod
sum tuple vars
str.capitalize str.casefold str.count str.encode str.endswith str.find str.format str.isalpha str.isdigit str.isspace
str.join str.lower str.lstrip str.removeprefix str.replace str.split str.splitlines str.startswith str.strip
str.swapcase str.title str.upper str.zfill
list.append list.copy list.extend list.index list.insert list.pop list.remove list.sort
dict.fromkeys dict.get dict.popitem dict.setdefault set.add set.discard set.pop set.union set.intersection
set.difference
"""

LIBRARY = """
math.ceil math.comb math.copysign math.dist math.factorial math.floor math.fsum math.isclose math.isfinite math.isnan
math.isqrt math.log math.perm math.prod math.radians math.sqrt math.trunc
random.choice random.choices random.randint random.sample random.seed random.shuffle random.uniform
statistics.mean statistics.median statistics.mode statistics.quantiles statistics.stdev statistics.variance
textwrap.dedent textwrap.fill textwrap.indent textwrap.shorten textwrap.wrap
re.compile re.escape re.findall re.finditer re.fullmatch re.match re.search re.split
json.dump json.dumps json.load json.loads copy.copy copy.deepcopy
shutil.copy shutil.copytree shutil.disk_usage shutil.make_archive shutil.move shutil.rmtree shutil.which
os.chdir os.cpu_count os.fork os.getcwd os.getenv os.kill os.listdir os.makedirs os.mkdir os.pipe os.remove
os.rename os.rmdir os.scandir os.symlink os.urandom
os.path.basename os.path.dirname os.path.exists os.path.expanduser os.path.isdir os.path.isfile os.path.join
os.path.normpath os.path.realpath os.path.split os.path.splitext
pathlib.Path pathlib.Path.mkdir pathlib.Path.read_text pathlib.Path.resolve
glob.glob tempfile.mkdtemp tempfile.mkstemp
heapq.heapify heapq.heappop heapq.heappush heapq.merge heapq.nlargest heapq.nsmallest bisect.insort
itertools.accumulate itertools.chain itertools.combinations itertools.compress itertools.cycle itertools.dropwhile
itertools.islice itertools.permutations itertools.product itertools.starmap itertools.takewhile
functools.cache functools.lru_cache functools.reduce functools.total_ordering functools.wraps
operator.attrgetter operator.itemgetter
collections.ChainMap collections.Counter collections.OrderedDict collections.deque collections.namedtuple
datetime.timedelta datetime.tzinfo time.monotonic time.perf_counter time.sleep time.strptime time.time
calendar.isleap secrets.choice secrets.compare_digest secrets.token_hex
base64.b64decode base64.b64encode struct.calcsize struct.pack struct.unpack
socket.create_connection socket.gethostname socket.socketpair
threading.Thread threading.Event threading.Timer threading.Barrier threading.current_thread threading.active_count
queue.Queue queue.LifoQueue queue.PriorityQueue subprocess.call subprocess.run
logging.getLogger contextlib.suppress contextlib.ExitStack
dataclasses.dataclass dataclasses.asdict dataclasses.replace enum.unique
inspect.getdoc inspect.getsource inspect.signature gc.collect sys.exit sys.getrefcount sys.getsizeof
shlex.join shlex.quote shlex.split pprint.pprint html.escape html.unescape urllib.parse.urlencode
urllib.parse.urljoin uuid.uuid4 zlib.adler32 zlib.compress gzip.open pickle.dumps pickle.loads
types.SimpleNamespace asyncio.gather asyncio.run asyncio.sleep asyncio.to_thread getpass.getpass
io.StringIO ast.literal_eval ast.parse unicodedata.normalize
"""

MODULES = """
abc argparse ast asyncio base64 bisect calendar cmd collections configparser contextlib copy csv ctypes datetime
difflib dis doctest fractions functools glob gzip hashlib heapq html inspect ipaddress itertools json
logging math mimetypes os pathlib pickle platform pprint queue random re secrets selectors shelve shlex shutil socket
sqlite3 statistics struct subprocess sys tarfile tempfile textwrap threading timeit traceback types
typing unittest uuid venv weakref webbrowser zipfile
"""

EXCEPTIONS = """
ArithmeticError AssertionError AttributeError BrokenPipeError EOFError Exception FileNotFoundError ImportError
IndentationError IndexError IsADirectoryError KeyError KeyboardInterrupt MemoryError ModuleNotFoundError NameError
NotImplementedError OSError OverflowError PermissionError RecursionError RuntimeError StopIteration SyntaxError
SystemExit TabError TimeoutError TypeError UnboundLocalError ValueError ZeroDivisionError
"""

# Subject as a question names it, the topic that treats it, and the words its answer starts at.
TOPICS = (
    ("the assert statement", "assert", "Assert statements are"),
    ("the await expression", "await", "Suspend the execution"),
    ("the break statement", "break", "It terminates the nearest"),
    ("the continue statement", "continue", "It continues with"),
    ("the pass statement", "pass", '"pass" is a null operation'),
    ("the return statement", "return", '"return" leaves the current'),
    ("the raise statement", "raise", "If no expressions are present"),
    ("the if statement", "if", 'The "if" statement is used'),
    ("the for statement", "for", 'The "for" statement is used'),
    ("the while statement", "while", 'The "while" statement is used'),
    ("the with statement", "with", 'The "with" statement is used'),
    ("the try statement", "try", 'The "try" statement specifies'),
    ("the global statement", "global", 'The "global" statement is'),
    ("the nonlocal statement", "nonlocal", 'The "nonlocal" statement causes'),
    ("the yield statement", "yield", 'A "yield" statement is'),
    ("a lambda expression", "lambda", "Lambda expressions (sometimes"),
    ("a function definition", "function", "A function definition defines"),
    ("a class definition", "class", "A class definition defines"),
    ("a context manager", "context-managers", "A *context manager* is"),
    ("a list display", "lists", "A list display is"),
    ("a dictionary display", "dict", "A dictionary display is"),
    ("an attribute reference", "attribute-references", "An attribute reference is"),
    ("a slicing", "slicings", "A slicing selects"),
    ("an imaginary literal", "imaginary", "An imaginary literal yields"),
    ("the Ellipsis object", "bltin-ellipsis-object", "This object is commonly"),
    ("the None object", "bltin-null-object", "This object is returned"),
    ("a type object", "bltin-type-objects", "Type objects represent"),
    ("a code object", "bltin-code-objects", "Code objects are used"),
    ("a code block", "execmodel", "A *block* is a piece"),
    ("an exception", "exceptions", "Exceptions are a means"),
    ("a mapping", "typesmapping", "A *mapping* object maps"),
    ("a method", "typesmethods", "Methods are functions"),
    ("augmented assignment", "augassign", "Augmented assignment is"),
    ("truth value testing", "truth", "Any object can be tested"),
    ("operator overloading", "specialnames", "A class can implement"),
    ("the power operator", "power", "The power operator binds"),
    ("the in operator", "in", 'The operators "in" and'),
    ("the del statement", "del", "Deletion of a target list"),
)

PASSAGES = (
    "assert", "async", "augassign", "binary", "booleans", "bltin-code-objects", "class", "context-managers", "dict",
    "exceptions", "for", "function", "global", "identifiers", "import", "in", "integers", "naming", "numeric-types",
    "objects", "operator-summary", "power", "raise", "slicings", "subscriptions", "truth", "try", "typesmethods",
    "with",
)  # fmt: skip
